"""aioreap measured beside its peers: ``make bench``; docs/performance.md says how."""

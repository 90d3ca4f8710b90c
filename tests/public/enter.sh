#!/bin/sh
# Runs a command in another root, on this kernel, with the repository where it is here. What it mounts
# is gone with it. Started as: unshare --mount sh enter.sh ROOT REPOSITORY COMMAND...
set -eu
root=$1 repository=$2
shift 2

mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -p "$root$repository"
mount --bind "$repository" "$root$repository"

exec env -i HOME=/root USER=root LOGNAME=root LANG=C.UTF-8 \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot "$root" "$@"

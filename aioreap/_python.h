/* Python.h, with the stable ABI of 3.11 where there is one. */
#ifndef AIOREAP_PYTHON_H
#define AIOREAP_PYTHON_H

#define _GNU_SOURCE
#include <pyconfig.h>
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The headers since 3.12 take None, True and False for immortal. Before 3.12, where an extension
 * built with them runs too, each such return would lose a reference. */
#undef Py_RETURN_NONE
#undef Py_RETURN_TRUE
#undef Py_RETURN_FALSE

#ifndef Py_BEGIN_CRITICAL_SECTION /* Python 3.13, outside the stable ABI */
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

#endif

/* What a child writes to a pipe: a type and functions for the module of _clone.c. */
#ifndef AIOREAP_OUTPUT_H
#define AIOREAP_OUTPUT_H

#include "_python.h"

/* Adds Output, wait_for_writer and take_line to the module; -1 with an exception if that fails. */
int output_add(PyObject *module);

#endif

/* What a child writes to a pipe: a type and a function for the module of _clone.c. */
#ifndef AIOREAP_OUTPUT_H
#define AIOREAP_OUTPUT_H

#include "_python.h"

/* Adds Output and wait_for_writer to the module; -1 with an exception if that fails. */
int output_add(PyObject *module);

#endif

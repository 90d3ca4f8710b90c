/*
 * A child with no C library: it writes BYTES bytes to stdout, if any, and exits.
 *
 * What a C library does before main() is part of no spawn. In a virtual machine each of glibc's
 * CPUID instructions there ends in the hypervisor, and all together they take longer than the rest.
 */
#include <asm/unistd.h>

#ifndef BYTES
#define BYTES 0
#endif

#ifdef __x86_64__
static long system_call(long number, long first, const void *second, unsigned long third) {
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(first), "S"(second), "d"(third)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
static long system_call(long number, long first, const void *second, unsigned long third) {
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = first;
    register const void *x1 __asm__("x1") = second;
    register unsigned long x2 __asm__("x2") = third;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
#else
#error "no system calls for this architecture"
#endif

static const char output[BYTES + 1];

__attribute__((noreturn)) void _start(void) {
    long status = 0;
    if (BYTES > 0 && system_call(__NR_write, 1, output, BYTES) != BYTES) {
        status = 1;
    }
    for (;;) {
        system_call(__NR_exit, status, 0, 0);
    }
}

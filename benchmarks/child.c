/*
 * What the children of the benchmarks do, but for those that do nothing (true.c):
 *
 *   child write BYTES SIZE   write BYTES to stdout, SIZE at a time
 *   child lines COUNT        write COUNT lines of 64 bytes
 *   child pause              live until killed, or until the thread that started it ends
 *   child report             write "r"; at SIGUSR1, write CLOCK_MONOTONIC (two longs) and exit
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 64, LINES_AT_ONCE = 1024 };

static void write_all(const char *buffer, size_t size) {
    while (size > 0) {
        ssize_t written = write(STDOUT_FILENO, buffer, size);
        if (written < 0) {
            _exit(1);
        }
        buffer += written;
        size -= (size_t)written;
    }
}

static void write_bytes(size_t left, size_t size) {
    char *buffer = malloc(size);
    if (buffer == NULL) {
        _exit(1);
    }
    memset(buffer, 'x', size);
    while (left > 0) {
        size_t some = left < size ? left : size;
        write_all(buffer, some);
        left -= some;
    }
}

static void write_lines(size_t left) {
    static char buffer[LINE * LINES_AT_ONCE];
    memset(buffer, 'x', sizeof buffer);
    for (size_t end = LINE - 1; end < sizeof buffer; end += LINE) {
        buffer[end] = '\n';
    }
    while (left > 0) {
        size_t some = left < LINES_AT_ONCE ? left : LINES_AT_ONCE;
        write_all(buffer, some * LINE);
        left -= some;
    }
}

static void report(void) {
    sigset_t awaited;
    int number;
    struct timespec now;
    sigemptyset(&awaited);
    sigaddset(&awaited, SIGUSR1);
    sigprocmask(SIG_BLOCK, &awaited, NULL);
    write_all("r", 1);
    sigwait(&awaited, &number);
    clock_gettime(CLOCK_MONOTONIC, &now);
    write_all((const char *)&now, sizeof now);
    _exit(0);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "write") == 0 && argc == 4) {
        write_bytes(strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
    } else if (strcmp(what, "lines") == 0 && argc == 3) {
        write_lines(strtoull(argv[2], NULL, 10));
    } else if (strcmp(what, "pause") == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pause();
    } else if (strcmp(what, "report") == 0) {
        report();
    } else {
        return 2;
    }
    return 0;
}

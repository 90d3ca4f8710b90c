/*
 * The peer in C: posix_spawn, a pidfd, epoll.
 *
 *   posix_spawn spawn|capture|descriptors SECONDS NUMBERS PROGRAM [ARGUMENT...]
 *
 * For each of NUMBERS, with commas between them: keep so many children at work for SECONDS, and
 * print, as one JSON object, how many came to their end per second. With "capture", stdout is
 * a pipe that is read to its end. With "descriptors", it is how many descriptors are open, 16
 * children are at work, and the microseconds for each are printed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_AT_ONCE = 1024, PIPE_EVENT = 1, BESIDE_DESCRIPTORS = 16 };

#ifndef P_PIDFD
#define P_PIDFD 3
#endif

extern char **environ;

struct slot {
    int pidfd;
    int pipe; /* -1 when it has ended, or is not wanted */
};

static int epoll;
static bool capture;
static char **command;
static struct slot slots[MOST_AT_ONCE];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void watch(int descriptor, int slot, int event) {
    struct epoll_event wanted = {.events = EPOLLIN, .data.u64 = (unsigned)slot * 2U + (unsigned)event};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &wanted) < 0) {
        fail("epoll_ctl");
    }
}

/* A child before its exec can have a copy, so that to close a descriptor does not unwatch it. */
static void release(int *descriptor) {
    epoll_ctl(epoll, EPOLL_CTL_DEL, *descriptor, NULL);
    close(*descriptor);
    *descriptor = -1;
}

static void start(int number) {
    struct slot *slot = &slots[number];
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t defaults;
    int ends[2] = {-1, -1};
    pid_t pid;

    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    /* Each library restores what Python ignores. */
    sigemptyset(&defaults);
    sigaddset(&defaults, SIGPIPE);
    sigaddset(&defaults, SIGXFSZ);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
    if (capture) {
        if (pipe2(ends, O_CLOEXEC) < 0) {
            fail("pipe2");
        }
        posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    }
    errno = posix_spawn(&pid, command[0], &actions, &attributes, command, environ);
    if (errno != 0) {
        fail("posix_spawn");
    }
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    slot->pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (slot->pidfd < 0) {
        fail("pidfd_open");
    }
    watch(slot->pidfd, number, 0);
    slot->pipe = ends[0];
    if (capture) {
        close(ends[1]);
        fcntl(slot->pipe, F_SETFL, O_NONBLOCK);
        watch(slot->pipe, number, PIPE_EVENT);
    }
}

static void read_pipe(struct slot *slot) {
    static char buffer[1 << 16];
    ssize_t size = read(slot->pipe, buffer, sizeof buffer);
    if (size == 0) {
        release(&slot->pipe);
    } else if (size < 0 && errno != EAGAIN) {
        fail("read");
    }
}

static void reap(struct slot *slot) {
    siginfo_t info;
    if (waitid((idtype_t)P_PIDFD, (id_t)slot->pidfd, &info, WEXITED) < 0) {
        fail("waitid");
    }
    if (info.si_code != CLD_EXITED || info.si_status != 0) {
        fprintf(stderr, "a child failed\n");
        exit(1);
    }
    release(&slot->pidfd);
}

static double rate(int level, double seconds) {
    struct epoll_event events[MOST_AT_ONCE];
    double begin = now(), end = begin + seconds;
    int running = level;
    long done = 0;
    for (int number = 0; number < level; number++) {
        start(number);
    }
    while (running > 0) {
        int count = epoll_wait(epoll, events, MOST_AT_ONCE, -1);
        for (int i = 0; i < count; i++) {
            int number = (int)(events[i].data.u64 / 2);
            struct slot *slot = &slots[number];
            if (events[i].data.u64 % 2 == PIPE_EVENT) {
                read_pipe(slot);
            } else {
                reap(slot);
            }
            if (slot->pidfd < 0 && slot->pipe < 0) {
                done++;
                if (now() < end) {
                    start(number);
                } else {
                    running--;
                }
            }
        }
    }
    return (double)done / (now() - begin);
}

static void open_descriptors(int count) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    for (int descriptor = -1; descriptor + 1 < count;) {
        descriptor = open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (descriptor < 0) {
            fail("open");
        }
        if (descriptor + 1 > count) {
            close(descriptor);
        }
    }
}

int main(int argc, char **argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: posix_spawn spawn|capture|descriptors SECONDS NUMBERS PROGRAM "
                        "[ARGUMENT...]\n");
        return 2;
    }
    double seconds = atof(argv[2]);
    const char *separator = "{";
    bool descriptors = strcmp(argv[1], "descriptors") == 0;
    capture = strcmp(argv[1], "capture") == 0;
    command = argv + 4;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    for (char *number = strtok(argv[3], ","); number != NULL; number = strtok(NULL, ",")) {
        int at_once = atoi(number);
        if (descriptors) {
            open_descriptors(at_once);
            at_once = BESIDE_DESCRIPTORS;
        }
        if (at_once < 1 || at_once > MOST_AT_ONCE) {
            return 2;
        }
        rate(at_once, seconds / 10);
        double found = rate(at_once, seconds);
        printf("%s\"%s\": %.2f", separator, number, descriptors ? 1e6 / found : found);
        separator = ", ";
    }
    puts("}");
    return 0;
}

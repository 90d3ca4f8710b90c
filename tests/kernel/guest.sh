#!/bin/sh
# Makes the fresh guest a place to run tests in, then runs a command there and exits with its status.
# Started by boot.py as: sh guest.sh REPOSITORY MODULES COMMAND_FILE
set -eu
repository=$1 modules=$2 command=$3

echo 1 >/sys/devices/system/cpu/cpu1/online

# Writes into the repository go to memory. (Beneath /root or /home they do so already.)
if touch "$repository/.writable" 2>/dev/null; then
    rm "$repository/.writable"
else
    mkdir -p /run/layer/upper /run/layer/work
    layers="lowerdir=$repository,upperdir=/run/layer/upper,workdir=/run/layer/work"
    mount -t overlay -o "xino=off,$layers" overlay "$repository"
fi

# A repository beneath /tmp stays where it is.
mkdir /run/repository
mount --bind "$repository" /run/repository
mount -t tmpfs -o mode=1777,size=1G tmpfs /tmp
if [ ! -e "$command" ]; then
    mkdir -p "$repository"
    mount --bind /run/repository "$repository"
fi

if [ ! -e "/lib/modules/$(uname -r)/modules.dep" ]; then
    mkdir -p /lib/modules
    mount -t tmpfs tmpfs /lib/modules
    ln -s "$modules" "/lib/modules/$(uname -r)"
fi
modprobe -q fuse 2>/dev/null || echo "guest.sh: no fuse: kmod is not in this root" >&2

mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in cpu memory pids; do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done

echo core >/proc/sys/kernel/core_pattern
prlimit --pid $$ --nofile=65536 --memlock=67108864

# The programs that the tests start most: one static file, which starts in a third of the time.
if [ -x /bin/busybox ]; then
    mkdir /run/programs
    cp /bin/busybox /run/programs/
    for name in cat false id sh sleep true; do
        ln -s busybox "/run/programs/$name"
    done
    ln -sf /run/programs/sh /bin/sh
fi

# The init program gave us virtio ports, which admit one opener and no poll: the command gets a
# pipe, and /dev/stdout is again its own.
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
mkfifo /run/output
cat /run/output &
copier=$!

cd "$repository"
status=0
env -i HOME=/root USER=root LOGNAME=root SHELL=/bin/sh LANG=C.UTF-8 TERM=dumb \
    PATH=/run/programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    sh "$command" </dev/null >/run/output 2>&1 || status=$?

# A process that the command left behind may hold the pipe: what it writes after this is lost.
(sleep 3 && kill "$copier") &
wait "$copier" || :
exit "$status"

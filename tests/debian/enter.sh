#!/bin/sh
# Makes a folder with a Debian in it the whole machine for one command:
#
#     unshare --mount --pid --uts --ipc --fork --kill-child \
#       sh enter.sh FOLDER COMMAND...
#
# A chroot would not do, since `nsenter -m` leaves it. The mounts and processes
# end with the command; the network is the machine's.
set -e
root=$1
shift
mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"

mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=755 dev dev
for device in null zero full random urandom tty; do
  touch dev/$device
  mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm run/lock run/old
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
cat /etc/resolv.conf > etc/resolv.conf
cat /etc/hosts > etc/hosts

pivot_root . run/old
umount -l run/old
rmdir run/old
# Not by exec: the first process is the one that ends orphans.
"$@"

#!/bin/sh
# First process of the guest, from the initrd: puts the guest's root together, and hands over to run.sh or systemd.
# What fails here ends this process, and so panics the kernel, which is seen outside.
set -eu
export PATH=/bin
/bin/busybox --install -s /bin

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order

# The host's root as the lower layer: what is written in the guest stays in its memory.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro,cache=loose root /lower
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root

port() {
  for entry in /sys/class/virtio-ports/*; do
    if [ -e "$entry/name" ] && [ "$(cat "$entry/name")" = "$1" ]; then
      echo "/dev/${entry##*/}"
      return
    fi
  done
}
# The kernel learns of the ports some time after it has found their device.
while [ -z "$(port out)" ] || [ -z "$(port err)" ]; do sleep 0.02; done
exec 3<>"$(port out)" 4<>"$(port err)"

IFS= read -r end <&3
while IFS= read -r line && [ "$line" != "$end" ]; do printf '%s\n' "$line"; done <&3 >/settings.sh
. /settings.sh

for name in proc sys; do mount --move "/$name" "/root/$name"; done
mount --bind /dev /root/dev # and here, where the shell wants its /dev/null
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t devpts -o ptmxmode=666 pts /root/dev/pts
case $checkout in /tmp/* | /run/*) mount --bind "/root$checkout" /checkout ;; esac
mount -t tmpfs -o mode=1777 tmp /root/tmp
mount -t tmpfs -o mode=755 run /root/run
case $checkout in /tmp/* | /run/*)
  mkdir -p "/root$checkout"
  mount --move /checkout "/root$checkout"
  ;;
esac
ip link set lo up

cgroups=/root/sys/fs/cgroup
case $cgroup in
systemd) ;; # mounts its own
v1)
  mount -t tmpfs -o mode=755 cgroup $cgroups
  for name in memory freezer pids; do
    mkdir $cgroups/$name
    mount -t cgroup -o $name $name $cgroups/$name
  done
  ;;
*)
  mount -t cgroup2 cgroup2 $cgroups
  for name in memory pids cpu; do
    # In the guest without the controller there is none to enable.
    if grep -qw "$name" $cgroups/cgroup.controllers; then echo "+$name" >$cgroups/cgroup.subtree_control; fi
  done
  ;;
esac

if [ "$swap" = yes ]; then
  mkswap /dev/vda >/dev/null
  swapon /dev/vda
fi

# A port can be opened once only; the command gets pipes, which it may open again as /dev/stdout. The relays run from
# the initrd's memory, so that a guest out of memory still tells what it has to tell.
mkdir /root/run/reprieve-vm
cp /settings.sh /run.sh /root/run/reprieve-vm
relay() {
  mkfifo "/root/run/reprieve-vm/$1"
  cat <>"/root/run/reprieve-vm/$1" &
  echo -1000 >"/root/proc/$!/oom_score_adj"
}
relay out >&3
relay err >&4
exec 3>&- 4>&-

if [ "$cgroup" = systemd ]; then
  # What the host starts by itself stays out, also where it is asked for as a dependency of every service.
  rm -rf /root/etc/systemd/system/*.wants /root/lib/systemd/system/*.wants /root/lib/systemd/system-generators
  : >/root/etc/fstab
  rm -f /root/.dockerenv # the host may be a container, the guest is none
  mkdir -p /root/run/systemd/system
  cp /units/* /root/run/systemd/system
  exec switch_root /root /lib/systemd/systemd --unit=reprieve-vm.target
fi
exec switch_root /root /bin/sh /run/reprieve-vm/run.sh

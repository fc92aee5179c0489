#!/bin/busybox sh
# The initial RAM disk's: load the disk's drivers, find the system by its label (disks come up in any order), go there.
/bin/busybox mount -t proc p /proc
/bin/busybox mount -t devtmpfs d /dev
for module in virtio_ring virtio virtio_mmio virtio_blk; do /bin/busybox insmod /$module.ko; done
/bin/busybox mount -t ext4 -o ro,noatime "$(/bin/busybox findfs LABEL=board)" /root || /bin/busybox poweroff -f
exec /bin/busybox switch_root /root /opt/boot-job.sh

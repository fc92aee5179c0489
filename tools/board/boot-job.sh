#!/bin/busybox sh
# The board's only process: run the job disk's job.sh, leave its exit code on the disk, power off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH=/opt/py PYTHONDONTWRITEBYTECODE=1 HOME=/tmp LC_ALL=C.UTF-8
busybox mount -t proc p /proc
busybox mount -t sysfs s /sys
busybox mount -t devtmpfs d /dev
busybox mount -t tmpfs -o size=16m t /tmp
busybox mount -t ext4 "$(busybox findfs LABEL=job)" /mnt || busybox poweroff -f
mkdir -p /mnt/out
cd /mnt && sh /mnt/job.sh
echo $? > /mnt/out/job.rc
cd / && sync
busybox umount /mnt
busybox poweroff -f

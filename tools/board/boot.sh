#!/bin/bash
# Boot an image with a job: boot.sh IMAGE JOB MEM_MIB CPU CORES. JOB is a folder with job.sh; JOB/out is brought back.
set -euo pipefail
image=$(realpath "$1") job=$(realpath "$2") mem=$3 cpu=$4 cores=$5
rm -rf "$job/out" "$job.img"
truncate -s "${JOB_MIB:-512}M" "$job.img"
mke2fs -q -F -t ext4 -O ^has_journal -L job -d "$job" "$job.img"
timeout -k 5 "${LIMIT_SECONDS:-1800}" nice -n 5 qemu-system-aarch64 -M virt -cpu "$cpu" -smp "$cores" -m "$mem" \
  -accel tcg,thread=multi -nographic -no-reboot -nic none \
  -kernel "$image/vmlinuz" -initrd "$image/initrd.gz" -append "console=ttyAMA0 quiet panic=-1" \
  -drive "if=none,id=a,file=$image/disk.img,format=raw,readonly=on" -device virtio-blk-device,drive=a \
  -drive "if=none,id=b,file=$job.img,format=raw,cache=unsafe" -device virtio-blk-device,drive=b \
  < /dev/null | sed -u 's,\r$,,'
debugfs -R "rdump out $job" "$job.img" 2> /dev/null
rm -f "$job.img"

#!/bin/bash
# A bootable arm64 Debian 12 with the packages of a constraints file: image.sh FOLDER CONSTRAINTS.
# Leaves FOLDER/{vmlinuz,initrd.gz,disk.img,packages.txt}. Only extracts packages: nothing arm64 runs here while it is built.
# Needs mmdebstrap, cpio, mke2fs and a Python 3.11 with pip (the image's Python is Debian 12's 3.11).
set -euo pipefail
folder=$(realpath -m "$1") constraints=$(realpath "$2") here=$(dirname "$(realpath "$0")")
python=3.11
mkdir -p "$folder" && cd "$folder"
root=$folder/root
rm -rf "$root" ird disk.img
# Debian's python3 lacks libstdc++6, which every wheel with C++ needs.
mmdebstrap --quiet --variant=extract --arch=arm64 \
  --include=python3,busybox-static,dash,coreutils,util-linux,libgomp1,libstdc++6,linux-image-cloud-arm64 bookworm "$root"
mkdir -p "$root"/{proc,sys,dev,tmp,run,mnt,opt/py}
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_aarch64")
done
grep -hv '^#' "$constraints" "$here/also.txt" > wanted.txt
# pip judges markers by the machine it runs on, so nothing is resolved: every package is named.
"${PIP_PYTHON:-python$python}" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
  --implementation cp --python-version $python "${platforms[@]}" --target "$root/opt/py" \
  -r wanted.txt
"${PIP_PYTHON:-python$python}" -m compileall -q -j2 -s "$root" "$root/opt/py" "$root/usr/lib/python$python" || true
(cd "$root/opt/py" && ls -d ./*.dist-info | sed 's,^\./,,; s,\.dist-info$,,' | sort) > packages.txt
kernel=$(ls "$root/lib/modules")
drivers=$root/lib/modules/$kernel/kernel/drivers
mv "$root/boot/vmlinuz-$kernel" vmlinuz
mkdir -p ird/{bin,proc,dev,root}
cp "$root/bin/busybox" ird/bin/
cp "$drivers"/virtio/{virtio,virtio_ring,virtio_mmio}.ko "$drivers"/block/virtio_blk.ko ird/
rm -rf "$root"/boot/* "$root/lib/modules"
install -m 755 "$here/init.sh" ird/init
install -m 755 "$here/boot-job.sh" "$root/opt/boot-job.sh"
(cd ird && find . | cpio -o -H newc --quiet | gzip -1) > initrd.gz
megabytes=$(du -sm "$root" | cut -f1)
truncate -s $((megabytes * 5 / 4 + 64))M disk.img
mke2fs -q -F -t ext4 -m 0 -O ^has_journal -L board -d "$root" disk.img
rm -rf "$root" ird

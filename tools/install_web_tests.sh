#!/usr/bin/env bash
# What the tests of the page need beside Python: Node, Chromium (Debian's, where one is root and has none), and two npm
# packages in .npm/, which git ignores. Without these the tests are skipped, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
command -v node >/dev/null || missing+=(nodejs)
command -v npm >/dev/null || missing+=(npm)
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
if ((${#missing[@]})); then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install ${missing[*]} first (as root on Debian, this script does)" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${missing[@]}"
fi
mkdir -p .npm
npm install --prefix .npm --ignore-scripts --no-audit --no-fund --silent onnxruntime-web@1.19.2 playwright-core@1.65.1

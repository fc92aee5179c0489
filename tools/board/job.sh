#!/bin/sh
# What the board does, as root on it. settings.sh says PROFILE, STEPS, BATCH and TOO_LARGE. Everything it leaves is judged by check.py.
. /mnt/settings.sh
export OMP_WAIT_POLICY=PASSIVE EDGETUNE_CACHE_DIR=/mnt/cache EDGETUNE_CONFIG_DIR=/mnt/config
out=/mnt/out
kills() { line=$(grep '^oom_kill ' /proc/vmstat); echo "${line#oom_kill }"; }
fact() { echo "$1=$2" | tee -a $out/facts.txt; }

# Anonymous memory of a process and its high-water mark, twice a second while it lives, then its exit code.
watched() {
  name=$1; shift
  "$@" > $out/$name.log 2>&1 &
  pid=$!
  [ -n "$AFTER_STEP" ] && interrupt_after $pid &
  while kill -0 $pid 2> /dev/null; do
    grep -E '^(RssAnon|RssFile|VmHWM)' /proc/$pid/status >> $out/$name.memory 2> /dev/null
    sleep 0.5
  done
  wait $pid
  fact $name.rc $?
  fact $name.oom_kills "$(kills)"
}

# A run is stopped once it has done a step, as SIGTERM stops it, so that it has something to go on with.
interrupt_after() {
  while kill -0 $1 2> /dev/null; do
    if [ -f /mnt/run/metrics.csv ] && [ "$(wc -l < /mnt/run/metrics.csv)" -gt "$AFTER_STEP" ]; then
      kill -TERM $1; return
    fi
    sleep 0.5
  done
}

fact kernel "$(uname -srm)"
fact cores "$(nproc)"
fact mem_total_kb "$(grep MemTotal /proc/meminfo | tr -dc 0-9)"
fact mem_available_kb "$(grep MemAvailable /proc/meminfo | tr -dc 0-9)"
fact swap_total_kb "$(grep SwapTotal /proc/meminfo | tr -dc 0-9)"

mkdir -p /mnt/site
python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-index --no-deps \
  --target /mnt/site /mnt/*.whl > $out/install.log 2>&1
fact install.rc $?
export PYTHONPATH=/mnt/site:/opt/py
python3 -m pip --disable-pip-version-check list --format freeze > $out/packages.txt 2>> $out/install.log
python3 -c "import edgetune, importlib.metadata as m; [m.distribution(r.split()[0].split('>')[0].split('=')[0].split('<')[0].split(';')[0]) for r in m.requires('edgetune') if 'extra' not in r and 'python_version' not in r]" >> $out/install.log 2>&1
fact requirements.rc $?

python3 /mnt/startup.py --once edgetune_micro > $out/startup.json 2> $out/startup.log
fact startup.rc $?
edgetune="python3 -m edgetune"
watched limit python3 /mnt/anonymous.py
first_kills=$(kills)
fact limit.kills "$first_kills"

task="--device $PROFILE --model edgetune_micro --data /mnt/images -q"
AFTER_STEP=1 watched run $edgetune finetune $task --batch-size $BATCH --steps $STEPS --output /mnt/run
AFTER_STEP='' watched resume $edgetune finetune --resume /mnt/run -q
AFTER_STEP='' watched evaluate $edgetune evaluate /mnt/run --json
cp /mnt/run/report.json /mnt/run/metrics.csv $out/ 2> /dev/null

# A step that is larger than the board, with no lever to make it smaller: killed by the kernel where nothing looks after it;
# where the board is promised 4 GiB, stopped by edgetune's watch over what is left, or killed; refused under its own cap.
whole="--method full -b $TOO_LARGE --grad-accum-steps 1 --recompute none --embeddings train --steps 2"
AFTER_STEP='' watched killed python3 /mnt/unguarded.py $TOO_LARGE
AFTER_STEP='' watched promised $edgetune finetune $task $whole --ram-cap 4GiB --enforce none --output /mnt/promised
AFTER_STEP='' watched refused $edgetune finetune $task $whole --output /mnt/refused
exit 0

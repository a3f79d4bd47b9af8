#!/bin/sh
# Two ranks in two network namespaces joined by a veth pair; scripts/overlap.py limits its rate and measures what each
# parallel method hides. Needs Linux, iproute2 and util-linux, no root where user namespaces are allowed; skips with a
# message elsewhere. Arguments go to scripts/overlap.py, or to a script that is named first; `python` is the one on the
# PATH.
#
#     benchmarks/overlap.sh [SCRIPT.py] [--rounds 5] [--size 320] [--share 1.0 ...] [-o FILE]
set -eu

skip() {
    echo "skipped: $1" >&2
    exit 0
}

if [ "${1-}" != --inside ]; then
    for tool in unshare nsenter ip tc; do
        command -v "$tool" >/dev/null || skip "$tool is not installed"
    done
    unshare --user --map-root-user --net true 2>/dev/null || skip "network namespaces are not allowed here"
    cd "$(dirname "$0")/.."
    exec unshare --user --map-root-user --net sh benchmarks/overlap.sh --inside "$@"
fi
shift
script=scripts/overlap.py
case "${1-}" in *.py) script=$1 && shift ;; esac

ip link set lo up
unshare --net sleep 100000 &
other=$!
trap 'kill $other ${first-} ${second-} 2>/dev/null || true' EXIT
trap 'exit 1' INT TERM
while [ "$(readlink "/proc/$other/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done

ip link add v0 type veth peer name v1 || skip "this kernel has no veth devices"
ip link set v1 netns "$other"
ip addr add 10.9.0.1/24 dev v0
ip link set v0 up
nsenter --target "$other" --net ip addr add 10.9.0.2/24 dev v1
nsenter --target "$other" --net ip link set v1 up
nsenter --target "$other" --net ip link set lo up
tc qdisc replace dev v0 root tbf rate 1gbit burst 1mb limit 4mb || skip "this kernel has no token bucket filter (tbf)"
tc qdisc del dev v0 root
# The link's queue is first in, first out: without a small limit for each connection (4 MB in new kernels) it would hold
# a whole step's bytes, and what is waited for would stand behind them. Network cards serve connections in turn.
# Nor does a real link forget its speed between two steps.
fair='cd /proc/sys/net/ipv4 && echo 131072 > tcp_limit_output_bytes && echo 0 > tcp_slow_start_after_idle'
sh -c "$fair" && nsenter --target "$other" --net sh -c "$fair" || skip "the settings of TCP cannot be changed"

export WORLD_SIZE=2 MASTER_ADDR=10.9.0.1 MASTER_PORT=29511 OMP_NUM_THREADS=1
RANK=1 GLOO_SOCKET_IFNAME=v1 nsenter --target "$other" --net python "$script" "$@" &
second=$!
RANK=0 GLOO_SOCKET_IFNAME=v0 python "$script" "$@" &
first=$!
wait "$first"
wait "$second"

#!/usr/bin/env bash
# One model over several hosts, without Ray: run it once on each host, in any order.
set -euo pipefail

usage() {
  cat >&2 <<'TEXT'
usage: multi_node.sh leader MASTER_ADDR [MODEL [OPTION...]]     on the host that has the address MASTER_ADDR
       multi_node.sh worker MASTER_ADDR [MODEL [OPTION...]]     on every other host

MODEL    a folder or hub id, the same on all hosts; "" or nothing: the embedded demo model
OPTION   handed on to `lockstep generate`, or `lockstep serve`, the same on all hosts (like --dtype float32;
         --api-server-count on the leader alone)

Set in the environment, the same on all hosts unless it says otherwise:
  MASTER_PORT=29501   a free port of the leader
  NNODES=2            how many hosts
  NODE_RANK=1         this host's number, worker only: 1, 2, ...
  TP=2 PP=2           tensor and pipeline parallel sizes; TP x PP is a multiple of the hosts of a replica
  DP=1                replicas; each has NNODES / DP of the hosts, or each host has DP / NNODES of the replicas
  PROMPT=...          what to complete, leader only
  SERVE=1             an OpenAI-compatible server on the leader instead of one completion; OPTION may then be
                      --host 0.0.0.0 --port 8000 (with LOCKSTEP_API_KEY=..., leader only) and all else that `lockstep serve` knows
  LOCKSTEP_CLUSTER_KEY=...  a secret that hosts prove to each other (make one with: openssl rand -hex 32);
                      without it whoever reaches the leader's port can take part
TEXT
  exit 2
}

fail() {
  echo "error: $1" >&2
  usage
}

number() { # NAME VALUE LEAST MOST
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] && (($2 >= $3 && $2 <= $4)) || fail "$1='$2' is not a whole number from $3 to $4"
}

[[ $# -ge 1 ]] || usage
role=$1
case $role in
  leader | worker) ;;
  *) fail "'$role' is neither leader nor worker" ;;
esac
[[ $# -ge 2 && -n $2 && $2 != -* ]] || fail "MASTER_ADDR is missing: the leader's address, as the other hosts reach it"
master_addr=$2
model=${3:-}
[[ $model != -* ]] || fail "MODEL comes before '$model': write \"\" for the embedded demo model"
shift $(($# < 3 ? $# : 3))

master_port=${MASTER_PORT:-29501} nnodes=${NNODES:-2} node_rank=${NODE_RANK:-1} tp=${TP:-2} pp=${PP:-2} dp=${DP:-1} serve=${SERVE:-0}
[[ $serve == [01] ]] || fail "SERVE='$serve' is neither 1 (a server) nor 0 (one completion)"
number MASTER_PORT "$master_port" 1 65535
number NNODES "$nnodes" 2 9999
number NODE_RANK "$node_rank" 1 9999
number TP "$tp" 1 9999
number PP "$pp" 1 9999
number DP "$dp" 1 9999
((node_rank < nnodes)) || fail "NODE_RANK=$node_rank is not below NNODES=$nnodes: the leader is 0, workers are 1 to $((nnodes - 1))"
((nnodes % dp == 0 || dp % nnodes == 0)) || fail "DP=$dp replicas do not divide among NNODES=$nnodes hosts, nor the hosts among them"
(((tp * pp * dp) % nnodes == 0)) || fail "TP x PP = $((tp * pp)) ranks${DP:+ of each of DP=$dp replicas} do not divide among NNODES=$nnodes hosts"
command -v lockstep >/dev/null || {
  echo "error: there is no 'lockstep' command: activate the environment that it is installed in" >&2
  exit 1
}

split=(--tensor-parallel-size "$tp" --pipeline-parallel-size "$pp" ${DP:+--data-parallel-size "$dp"})
meet=(--nnodes "$nnodes" --master-addr "$master_addr" --master-port "$master_port")
case $role$serve in
  leader0) exec lockstep generate ${model:+"$model"} --node-rank 0 "${meet[@]}" "${split[@]}" --temperature 0 --prompt "${PROMPT:-def fibonacci(n):}" "$@" ;;
  leader1) exec lockstep serve ${model:+"$model"} --node-rank 0 "${meet[@]}" "${split[@]}" "$@" ;;
  worker0) exec lockstep generate ${model:+"$model"} --headless --node-rank "$node_rank" "${meet[@]}" "${split[@]}" "$@" ;;
  worker1) exec lockstep serve ${model:+"$model"} --headless --node-rank "$node_rank" "${meet[@]}" "${split[@]}" "$@" ;;
esac

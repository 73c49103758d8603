#!/usr/bin/env bash
# Without a queue: one agent's stage on several machines by ssh, a part each, then one ledger.
#   slurm/over_ssh.sh params/X.yaml reflect runs/X/reflect/reflections.jsonl node1 node2 node3
# The machines see this folder under the same path and have the environment in .venv. Called again, finished parts are skipped, others go on, and the ledger grows by what they found.
set -euo pipefail

usage="usage: $0 PARAMS STAGE LEDGER HOST..."
params=${1:?$usage}
stage=${2:?$usage}
ledger=${3:?$usage}
shift 3
hosts=("$@")
[[ ${#hosts[@]} -gt 0 ]] || { echo "$usage" >&2; exit 2; }

run_dir=$(dirname "$(dirname "$ledger")")
pids=()
for i in "${!hosts[@]}"; do
    printf -v command 'cd %q && . .venv/bin/activate && OMP_NUM_THREADS=1 vtg run %q --only %q --part %q --runs %q' \
        "$PWD" "$params" "$stage" "$i/${#hosts[@]}" "$(dirname "$run_dir")"
    ${SSH:-ssh} "${hosts[$i]}" "$command" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
mkdir -p "$(dirname "$ledger")"
asked=train # whose samples must all be there
[[ $stage != evaluate* ]] || asked=heldout
vtg merge "$ledger" "$run_dir/$stage".part-*-of-"${#hosts[@]}/$(basename "$ledger")" --samples "$run_dir/prepare/$asked.jsonl"

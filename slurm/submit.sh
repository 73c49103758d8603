#!/usr/bin/env bash
# A whole run as a chain of Slurm jobs, each after those it needs:
#   slurm/submit.sh params/charades_qwen2_5_vl_7b_8gpu.yaml [PARTS] [NODES]
#   DRY_RUN=1 slurm/submit.sh ...      prints the jobs and submits none
# prepare on CPUs; each agent in PARTS parts (16), one GPU a part; then one job that merges the parts and selects; each training on NODES machines (1) where the
# params file has `launch`; then evaluation, what else is left, and the report on one machine. GPUS_A_NODE (8) and, for your cluster's partition and
# account, SBATCH_PARTITION and SBATCH_ACCOUNT are read from the environment. Submitted again, finished stages are skipped and others go on.
set -euo pipefail

usage="usage: [DRY_RUN=1] slurm/submit.sh PARAMS [PARTS] [NODES]"
params=${1:?$usage}
parts=${2:-16}
nodes=${3:-1}
gpus=${GPUS_A_NODE:-8}
here=$(dirname "$0")
if [[ -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

plan=$(python - "$params" <<'PY'
import sys
from videotg_r1.config import load_params
from videotg_r1.datasets import params_file
from videotg_r1.stages import WIRES, plan_run
config = load_params(params_file(sys.argv[1]))
names = [j.name for j in plan_run(config)]
files = {"reflect": WIRES["reflections"], "estimate": WIRES["difficulties"]}
launch = config["shared"].get("launch", "")
print(config["run"])
print(launch)
print(*(n + "/" + files[n].split("/")[1] for n in names if n in files))
print(*(n for n in names if launch and n.startswith("train-")))
print(",".join(n for n in names if n in (*files, "select")))
PY
)
{ read -r run; read -r launch; read -ra ledgers; read -ra trainings; read -r middle; } <<<"$plan"

submit() { # NAME, then arguments of sbatch; prints the job's number
    local name=$1
    shift
    if [[ -z ${DRY_RUN:-} ]]; then
        sbatch --parsable --job-name "vtg-$name" "$@" | cut -d ';' -f 1
    else
        local word line="sbatch --job-name vtg-$name"
        for word in "$@"; do if [[ $word =~ [^[:alnum:]_./:=,-] ]]; then line+=" ${word@Q}"; else line+=" $word"; fi; done
        echo "$line" >&2
        echo "NUMBER_OF_$name"
    fi
}

last=$(submit prepare --cpus-per-task=16 --mem=64G --time=12:00:00 --wrap "vtg run $params --only prepare")
agents=()
for ledger in "${ledgers[@]}"; do
    agents+=("$(submit "${ledger%%/*}" --dependency="afterok:$last" --array="0-$((parts - 1))" "$here/agents.sbatch" "$params" "${ledger%%/*}")")
done
[[ ${#agents[@]} -eq 0 ]] || last=$(IFS=:; echo "${agents[*]}")
last=$(submit gather --dependency="afterok:$last" "$here/gather.sbatch" "$params" "runs/$run" "$parts" "$middle" "${ledgers[*]}" "${trainings[*]}")
trained=()
for job in "${trainings[@]}"; do
    trained+=("$(submit "$job" --dependency="afterok:$last" --nodes="$nodes" --gres="gpu:$gpus" "$here/train.sbatch" "runs/$run/$job.job.json" "$launch")")
done
[[ ${#trained[@]} -eq 0 ]] || last=$(IFS=:; echo "${trained[*]}")
submit report --dependency="afterok:$last" --gres="gpu:$gpus" --mem=0 "$here/run.sbatch" "$params"

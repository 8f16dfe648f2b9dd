# The only file with facts of this site; all else follows from SLURM's variables. `launch/submit` reads
# it and copies it with the code. W2S_SITE=FILE uses another file instead.
# shellcheck shell=bash disable=SC2034
account=              # empty: the user's default
partition=
gpus_per_node=8       # 0: processes run on CPUs
tasks_per_node=8      # processes on a node: one per GPU
cpus_per_task=12
memory=0              # of a node, as --mem takes it; 0 is all of it
time_limit=24:00:00
warning=180           # seconds before the limit at which processes are told to save and stop
master_addr=          # empty: the first node's name; such as $(hostname -i) where names do not resolve
options=()            # more options of sbatch, such as (--qos=long --gres=gpu:a100:8)
launcher=()           # before python on each process, such as (apptainer exec --nv image.sif)
srun_options=()       # more options of srun, such as (--container-image=image.sqsh)

# Run once per job, in the project folder on the first node; the processes inherit its environment.
setup() {
    # module load cuda
    source .venv/bin/activate
}

#!/usr/bin/env bash
# sgg against sgg_fast on the digits: the same seeds, scored once at the end; two minutes a run on a
# core. Runs that are finished are left out, stopped ones go on.
#   bash experiments/sgg_fast/run.sh [RECIPE ...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/env.sh" ""
here=experiments/sgg_fast
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- sgg sgg_fast
mkdir -p $here/scores
for seed in ${SEEDS:-20 21 22 23}; do
    for recipe in "$@"; do
        run=runs/sgg_fast/$recipe-$seed
        [ -f "$here/scores/$recipe-$seed.json" ] && continue
        echo "== $recipe, seed $seed"
        lightning fit -c configs/digits_w2s.yaml -c "configs/weak/$recipe.yaml" \
            --seed_everything "$seed" --trainer.val_check_interval 1800 \
            --trainer.default_root_dir "$run" --ckpt_path last || exit 1
        cp "$run/scores.json" "$here/scores/$recipe-$seed.json"
    done
done
python experiments/table.py $here

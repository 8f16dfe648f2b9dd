#!/usr/bin/env bash
# Every recipe of configs/weak on the digits, three seeds: about a minute a run on one CPU core.
# Runs that are finished are left out, stopped ones go on; their scores are copied to scores/.
#   bash experiments/digits_recipes/run.sh [RECIPE ...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/env.sh" ""
here=experiments/digits_recipes
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- $(basename -s .yaml configs/weak/*.yaml)
mkdir -p $here/scores
for seed in 10 11 12; do
    for recipe in "$@"; do
        run=runs/digits_recipes/$recipe-$seed
        [ -f "$here/scores/$recipe-$seed.json" ] && continue
        echo "== $recipe, seed $seed"
        lightning fit -c configs/digits_w2s.yaml -c "configs/weak/$recipe.yaml" \
            --seed_everything $seed --trainer.default_root_dir "$run" --ckpt_path last || exit 1
        cp "$run/scores.json" "$here/scores/$recipe-$seed.json"
    done
done
python experiments/table.py $here

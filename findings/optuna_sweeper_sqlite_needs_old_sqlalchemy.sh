#!/usr/bin/env bash
# hydra-optuna-sweeper 1.3.0 pins optuna below 3 but not what optuna stores studies with: pip so brings SQLAlchemy 2.1 and alembic
# 1.20, with which a study in a file (hydra.sweeper.storage=sqlite:///study.db) ends in a bare AssertionError before its first trial,
# while the same sweep in memory works. With sqlalchemy<2 and alembic<1.14 the file works.
# Seen: "AssertionError" from optuna's version check, then 2 trials in study.db with SQLAlchemy 1.4.54 and alembic 1.13.3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > app.py <<'PY'
import hydra


@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(config):
    return float(config.x) ** 2


main()
PY
sweep=(app.py -m hydra/sweeper=optuna hydra.sweeper.n_trials=2 hydra.sweeper.storage=sqlite:///study.db "+x=interval(-1,1)")
python3 -m venv new
new/bin/pip install -q setuptools==80.9.0 hydra-core==1.3.8 hydra-optuna-sweeper==1.3.0 optuna==2.10.1 sqlalchemy==2.1.0 alembic==1.20.1
if HYDRA_FULL_ERROR=1 new/bin/python "${sweep[@]}" > new.log 2>&1; then
  echo "it works now"; exit 1
fi
tail -1 new.log
grep -q AssertionError new.log
python3 -m venv old
old/bin/pip install -q setuptools==80.9.0 hydra-core==1.3.8 hydra-optuna-sweeper==1.3.0 optuna==2.10.1 sqlalchemy==1.4.54 alembic==1.13.3
rm -f study.db
old/bin/python "${sweep[@]}" > old.log 2>&1
old/bin/python -c "import sqlite3; print(sqlite3.connect('study.db').execute('select count(*) from trials').fetchone()[0], 'trials')" | grep -x "2 trials"
echo "as found"

# Sourced by the other scripts. `root` is the project's folder. `python` is the interpreter: that of
# .venv (scripts/setup) where there is one, else the one that PYTHON names, else python3.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=${PYTHON:-python3}

# Makes .venv where there is none.
set_up() {
  [[ -x $root/.venv/bin/kv-eviction ]] || "$root/scripts/setup"
  python=$root/.venv/bin/python
}

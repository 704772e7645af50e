#!/usr/bin/env bash
# Make .venv with all that building, testing and the quickstart need; a second call takes no time.
#
# Usage: tools/make_venv.sh                   looks for Python 3.12, then 3.13, then newer
#        PYTHON=/path/to/python tools/make_venv.sh
#
# Candidates are *run*, not only found: a pyenv shim for a version that is not active exists on
# PATH and fails with status 127.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP=$VENV/megasft-stamp           # what this environment was made from; written last
readonly UNFINISHED=$VENV/megasft-unfinished # pip is at work, or died at it

candidates() { # paths and names, best guess first
  if [[ -n ${PYTHON:-} ]]; then
    printf '%s\n' "$PYTHON"
    return
  fi
  printf '%s\n' python3.12 python3.13 python3.14 python3 python
  local folder
  for folder in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin; do
    if [[ -x $folder/python ]]; then printf '%s\n' "$folder/python"; fi
  done
}

probe() { # name or path -> "minor executable", or one line on stderr that says why not
  local answer status=0
  answer=$("$1" -c '
import sys
if sys.version_info[:2] < (3, 12):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
import ensurepip, venv
print(sys.version_info[1], sys.executable)' 2>&1) || status=$?
  if ((status == 0)); then
    printf '%s\n' "$answer"
  elif ((status == 126 || status == 127)); then
    printf '  %s: does not run here (status %d)\n' "$1" "$status" >&2
  else
    answer=${answer##*$'\n'}
    printf '  %s: %s\n' "$1" "${answer:-fails with status $status}" >&2
  fi
}

find_python() { # prints the chosen executable
  local tried found candidate minor executable wanted
  tried=$(mktemp)
  found=$(candidates | while read -r candidate; do probe "$candidate" 2>>"$tried"; done)
  for wanted in '12' '13' '[0-9]+'; do
    while read -r minor executable; do
      if [[ $minor =~ ^$wanted$ ]]; then
        rm -f "$tried"
        printf '%s\n' "$executable"
        return
      fi
    done <<<"$found"
  done
  {
    printf 'megasft needs Python >= 3.12 with the venv module, and none of these is one:\n'
    cat "$tried"
    printf 'Install one (for example: pyenv install 3.12, or apt install python3.12-venv) or name it: PYTHON=/path/to/python %s\n' "$0"
  } >&2
  rm -f "$tried"
  return 1
}

fingerprint() { # python -> what an environment made by it, here and now, is made from
  # The folder is part of it: the scripts of an environment hold its absolute path.
  printf '%s\n' "$("$1" -V 2>&1)" "$PWD" "$(cat pyproject.toml constraints.txt | cksum)"
}

is_current() { # is the environment finished, made from these files, and by the Python asked for?
  [[ -f $STAMP && ! -e $UNFINISHED ]] || return 1
  [[ $(<"$STAMP") == "$(fingerprint "$VENV/bin/python" 2>/dev/null)" ]] || return 1
  [[ -z ${PYTHON:-} || $("$PYTHON" -V 2>&1) == "$("$VENV/bin/python" -V 2>&1)" ]]
}

is_reusable() { # python: can pip update the environment in place?
  [[ ! -e $UNFINISHED ]] || return 1
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || return 1
  [[ $("$VENV/bin/python" -V 2>&1) == "$("$1" -V 2>&1)" ]]
}

if is_current; then exit 0; fi

python=$(find_python)
if ! is_reusable "$python"; then
  printf 'Making %s with %s (%s).\n' "$VENV" "$("$python" -V)" "$python"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
fi
printf 'Installing megasft and what it needs into %s: about 5 GB the first time, most of it torch; minutes.\n' "$VENV"
rm -f "$STAMP"
touch "$UNFINISHED"
started=$SECONDS
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
  --editable '.[dev]' --constraint constraints.txt
fingerprint "$VENV/bin/python" >"$STAMP"
rm -f "$UNFINISHED"
printf 'Ready after %d s: %s.\n' "$((SECONDS - started))" "$("$VENV/bin/python" -V)"

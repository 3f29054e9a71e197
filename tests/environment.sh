# Sourced by tests/run.sh and examples/quickstart.sh: a virtual environment in .venv with this package and one extra.
#   ensure_environment EXTRA     sets PYTHON; PYTHON and MEGASP_VENV from outside win
ensure_environment() {
    local venv="${MEGASP_VENV:-.venv}"
    if [ ! -x "$venv/bin/python" ]; then
        echo "making a virtual environment in $venv"
        "${PYTHON:-python3.11}" -m venv "$venv"
    fi
    PYTHON="$venv/bin/python"
    PATH="$PWD/$venv/bin:$PATH"
    # The stamp says what was installed, so that a second run installs nothing.
    local stamp="$venv/.installed-$1" wanted
    wanted="$(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing megasp and its '$1' dependencies (constraints.txt)"
        # torch first and by its exact version, so that no other package's requirement chooses which build comes.
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]"
        echo "$wanted" > "$stamp"
    fi
}

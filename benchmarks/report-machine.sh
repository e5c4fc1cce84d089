#!/bin/sh
# Write a machine report, as `make report-machine` does, on a computer that has only curl and tar:
#
#     mkdir -p mlxgpt-report && curl -fL https://github.com/OWNER/mlxgpt/archive/HEAD.tar.gz |
#         tar -xz -C mlxgpt-report --strip-components 1 && sh mlxgpt-report/benchmarks/report-machine.sh
#
# A new Mac has no make, git or Python. uv, a Python and all packages are installed into that folder.
# The report is written to the current one. Takes the arguments of machine_report.py.
set -eu

folder="$PWD"
cd "$(dirname "$0")/.."
sh .ci/check_system.sh

tools="$PWD/.uv"
export XDG_CACHE_HOME="$tools/cache" UV_PYTHON_INSTALL_DIR="$tools/python"
# uv would otherwise run the python3 of macOS, which opens a dialog if the developer tools are missing.
export UV_PYTHON_PREFERENCE="${UV_PYTHON_PREFERENCE:-only-managed}"
PATH="$tools:$PATH"

if ! command -v uv >/dev/null; then
    mkdir -p "$tools"
    curl -LsSf --output "$tools/install.sh" https://astral.sh/uv/install.sh
    UV_UNMANAGED_INSTALL="$tools" sh "$tools/install.sh"
fi
if [ ! -x .venv/bin/python ]; then
    # https://github.com/astral-sh/uv/issues/14893
    if [ "$(uname -s)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
        echo 'If macOS offers to install the command line developer tools, cancel: they are not needed.'
    fi
    echo "installing Python and mlxgpt into $PWD"
    uv venv --quiet --seed --python 3.13 .venv
fi
uv pip install --quiet --python .venv/bin/python --editable '.[dev]'
status=0
.venv/bin/python benchmarks/machine_report.py --output "$folder" "$@" || status=$?
echo "To remove what was installed: rm -r '$PWD/.uv' '$PWD/.venv'"
exit $status

# What the scripts here share; source it.

export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# The installed package is under test, not the checkout.
export PYTHONSAFEPATH=1

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

# not_run WHAT: said at once, and once more by .ci/run before its last tests.
not_run() {
    echo "not run: $1"
    [ -z "${OBJSLOT_NOT_RUN:-}" ] || echo "not run: $1" >>"$OBJSLOT_NOT_RUN"
}

# with_apt PACKAGE...: whether Debian's packages were installed.
with_apt() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    { apt-get update && apt-get install -y --no-install-recommends "$@"; } >/dev/null 2>&1
}

# cached FOLDER TREE: what compilers make is kept there, for later builds of the same sources in other trees.
cached() {
    command -v ccache >/dev/null || with_apt ccache || return 0
    export CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_DIR=$1 CCACHE_BASEDIR=$2 CCACHE_NOHASHDIR=1
}

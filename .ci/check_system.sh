# Check that MLX has wheels for this system; else print why not, and exit with 1.
if [ "$(uname -s)" = Darwin ] && [ "$(uname -m)" != arm64 ]; then
    echo 'mlxgpt needs a Mac with Apple silicon, and a terminal without Rosetta' >&2
    exit 1
fi
case "$(sw_vers -productVersion 2>/dev/null)/$(getconf GNU_LIBC_VERSION 2>/dev/null)" in
    [0-9].*/* | 1[0-3]/* | 1[0-3].*/*)
        echo 'mlxgpt needs macOS 14 or later: MLX has no wheel for earlier ones' >&2
        exit 1
        ;;
    */glibc\ 2.[0-9] | */glibc\ 2.[0-2][0-9] | */glibc\ 2.3[0-4])
        echo 'mlxgpt needs glibc 2.35 or later, as in Ubuntu 22.04 and Debian 12: MLX has no wheel' \
            'for earlier ones' >&2
        exit 1
        ;;
esac

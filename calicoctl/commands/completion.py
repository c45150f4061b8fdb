"""Print a script that lets a shell complete calicoctl's command lines.

Usage:
  calicoctl completion (bash | zsh)

`make install` installs it where the shells look for it. It completes
keywords, including those of rules, and the names of containers, namespaces,
profiles, tags, pools, addresses, endpoints, hosts and settings, as far as
etcd and Docker answer within two seconds. Names of files are completed only
where a file is expected.

Examples:
  source <(calicoctl completion bash)
  calicoctl completion zsh >_calicoctl    # in a folder of zsh's $fpath
"""

from __future__ import annotations

import os
import signal
from functools import partial
from types import FrameType

from calicoctl.grammar import Prepared, parse

TIMEOUT = 2
"""Seconds after which the query for candidates is aborted. One second later, the process exits without candidates."""

BASH = """\
# bash completion for calicoctl
_calicoctl() {
    local IFS=$'\\n'
    COMPREPLY=($(calicoctl completion candidates bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    case ${COMPREPLY[0]} in
    :files) COMPREPLY=(); compopt -o default ;;
    :directories) COMPREPLY=(); compopt -o dirnames ;;
    *=) [[ ${#COMPREPLY[@]} -gt 1 ]] || compopt -o nospace ;;
    esac
}
complete -F _calicoctl calicoctl
# bash-completion completes what is behind sudo; where it is not there, this does
_calicoctl_sudo() {
    local words=" ${COMP_WORDS[*]:1:COMP_CWORD-1} "
    if [[ $words == *[\\ /]calicoctl\\ * ]]; then
        compopt +o default
        _calicoctl
    fi
}
if ! { declare -F _comp_load || declare -F _completion_loader || complete -p sudo; } &>/dev/null; then
    complete -o default -F _calicoctl_sudo sudo
fi
"""

ZSH = """\
#compdef calicoctl
# zsh completion for calicoctl
_calicoctl() {
    local -a found
    found=(${(f)"$(calicoctl completion candidates zsh "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    if [[ $found[1] == :* ]]; then
        compset -P '*='
        [[ $found[1] == :files ]] && _files || _files -/
    elif (( $#found )); then
        compadd -Q -S '' -- ${(M)found:#*=}
        compadd -Q -- ${found:#*=}
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _calicoctl "$@"
else
    compdef _calicoctl calicoctl
fi
"""


def prepare(argv: list[str]) -> Prepared:
    if argv[1:2] == ["candidates"] and len(argv) == 4:  # called by the scripts only
        return partial(_candidates, argv[2], argv[3])
    arguments = parse(str(__doc__), argv)
    return partial(print, BASH if arguments["bash"] else ZSH, end="")


def _out_of_time(number: int, frame: FrameType | None) -> None:
    """Handle the first SIGALRM: raise OutOfTime. A second SIGALRM follows one second later, and ends the process."""
    from calicoctl.cli.completion import OutOfTime

    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.alarm(1)
    raise OutOfTime


def _candidates(shell: str, line: str) -> None:
    from calicoctl.cli import completion

    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(TIMEOUT)
    words = completion.candidates(line)
    if words and words[0] in (completion.FILES, completion.DIRECTORIES):
        print(words[0])
        return
    # bash completes only what follows the last of these
    typed = line.rpartition(" ")[2]
    start = max(typed.rfind("="), typed.rfind(":")) + 1 if shell == "bash" else 0
    print("".join(f"{word[start:]}\n" for word in words), end="")

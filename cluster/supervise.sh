# Keeps a program running; sourced by store-node and head-node. Linux, bash 4.4 or newer, util-linux.
#
# A raylet that was declared dead ends when it hears of it, and so does one whose head began anew: what is wanted is
# not a raylet that lives for ever but one that is started again.

FIRST_S=1 MOST_S=10 # pause before it is started again: doubles from the first to the most
STEADY_S=30         # who ran so long was well: the pause begins at the first again
GRACE_S=10          # between SIGTERM and SIGKILL
TICK_S=0.1          # it looks so often whether a child has ended or it is time to stop

me=$(basename "$0")
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
stopping='' ended='' again='' insecure='' children=()
[[ -d $here/../.venv/bin ]] && PATH=$(readlink -f "$here/../.venv/bin"):$PATH

# Nothing on a node is worth a drain of 30 s: a store keeps what it has finished, a coordinator what it has decided.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S-0}
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
# What has not come after so long Ray asks for again, and all of it is sent again; its own 10 s are too few for a thin line.
export RAY_object_manager_pull_timeout_ms=${RAY_object_manager_pull_timeout_ms-600000}

say() { echo "$me: $*"; }
refuse() { # what is wrong and what would be right, in one line
    echo "$me: $*" >&2
    exit 2
}

need_address() { # HOST:PORT
    [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{1,5}$ ]] || refuse "--address ${1@Q}: write HOST:PORT, e.g. 10.0.0.1:6379"
    ((10#${1##*:} >= 1 && 10#${1##*:} <= 65535)) || refuse "--address $1: a port is 1 to 65535"
}

need_programs() {
    local name
    for name in setsid setpriv flock timeout "$@"; do
        command -v "$name" >/dev/null || refuse "no program $name in PATH: $PATH"
    done
}

need_doors() { # a token and certificates: the environment's, else what `raypipe certs send` put on this machine
    local tls=~/.raypipe/tls
    [[ -z $insecure ]] || return 0
    [[ -d $tls || -n ${RAY_TLS_SERVER_CERT-} ]] ||
        refuse "no $tls: raypipe certs send gives a node its token and certificate; --insecure does without"
    export RAY_AUTH_MODE=${RAY_AUTH_MODE-token} RAY_USE_TLS=${RAY_USE_TLS-1}
    [[ -n ${RAY_AUTH_TOKEN-} ]] || export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH-$tls/token}
    export RAY_TLS_SERVER_CERT=${RAY_TLS_SERVER_CERT-$tls/node.crt} RAY_TLS_SERVER_KEY=${RAY_TLS_SERVER_KEY-$tls/node.key}
    export RAY_TLS_CA_CERT=${RAY_TLS_CA_CERT-$tls/ca.crt}
    [[ $RAY_AUTH_MODE == token && ${RAY_USE_TLS,,} =~ ^(1|true)$ ]] ||
        refuse "RAY_AUTH_MODE=$RAY_AUTH_MODE RAY_USE_TLS=$RAY_USE_TLS let strangers in: token and 1, or say --insecure"
    need_programs raypipe
}

doors_hold() { # before each start, as a certificate ends while its node is kept; fails when this is not the first
    local said
    [[ -z $insecure ]] || return 0
    said=$(raypipe certs check 2>&1) && return
    said=${said%%$'\n'*} said=${said#raypipe: }
    [[ -n $again ]] || refuse "$said"
    say "$said"
    return 1
}

need_alone() { # a file that one supervisor at a time holds; what it starts does not
    : 2>/dev/null >>"$1" || refuse "$1 cannot be written"
    exec {lock}>>"$1"
    flock -n "$lock" || refuse "another one is at work: it holds $1"
}

exec {nothing}<> <(:) # a pipe that nobody writes to

tick() { # no child to wait for: a signal that comes when `wait` has just reaped one makes bash 5.2 wait for ever
    read -rt "$TICK_S" <&"$nothing" || return 0
}

pause() { # SECONDS [CHILD]: or until it is time to stop, or the child has ended
    local ticks=$(($1 * 10))
    while ((ticks-- > 0)) && [[ -z $stopping ]] && runs "${2-$$}"; do
        tick
    done
}

start() { # a program in a session of its own, told to end when this process dies; its id in $started
    setsid setpriv --pdeathsig TERM -- "$@" {lock}>&- {nothing}>&- &
    started=$!
    children+=("$started")
}

runs() { # a child
    kill -0 "$1" 2>/dev/null
}

finish() { # end a child and all that it started, nobody else's; its status in $ended
    local child=$1 ticks=0 left=() other
    kill -TERM "$child" 2>/dev/null
    while runs "$child" && ((ticks++ < GRACE_S * 10)); do
        tick
    done
    kill -KILL -- "-$child" 2>/dev/null
    while runs "$child"; do
        tick
    done
    wait "$child" # has ended: only its status is asked for
    ended=$?
    for other in "${children[@]}"; do
        [[ $other == "$child" ]] || left+=("$other")
    done
    children=("${left[@]+"${left[@]}"}")
}

raylet_of() { # the raylet that a `ray start` has started; fails when there is none
    local file line
    for file in /proc/[0-9]*/stat; do
        read -r line 2>/dev/null <"$file" || continue
        [[ $line =~ ^([0-9]+)\ \(raylet\)\ [^ZX]\ [0-9]+\ [0-9]+\ $1\  ]] && echo "${BASH_REMATCH[1]}" && return
    done
    return 1
}

watch() { # a `ray start --block`, until it ends, its raylet has ended (it does not always tell), or it is time to stop
    local raylet=''
    while [[ -z $stopping ]] && runs "$1"; do
        if [[ -z $raylet ]]; then
            raylet=$(raylet_of "$1")
        elif [[ ! -d /proc/$raylet ]]; then
            return
        fi
        [[ -z ${2-} ]] || "$2"
        pause 1 "$1"
    done
}

await() { # HOST:PORT [OF]; fails when it is time to stop, or when the child OF it has ended
    local said=''
    until timeout 2 bash -c ": </dev/tcp/${1%:*}/${1##*:}" 2>/dev/null; do
        [[ -z $stopping ]] && runs "${2-$$}" || return 1
        [[ -n $said ]] || say "waits for $1"
        said=1
        pause 1
    done
}

supervise() { # a function, with arguments, that starts something and waits for its end: again and again
    local wait_s=$FIRST_S began
    trap 'stopping=1' TERM INT HUP
    while [[ -z $stopping ]]; do
        began=$SECONDS
        "$@"
        while ((${#children[@]})); do
            finish "${children[-1]}"
        done
        [[ -z $stopping ]] || break
        ((ended != 2)) || refuse "ray start refused an option: see above"
        ((SECONDS - began < STEADY_S)) || wait_s=$FIRST_S
        again=1
        say "it has ended: again in $wait_s s"
        pause "$wait_s"
        wait_s=$((wait_s * 2 < MOST_S ? wait_s * 2 : MOST_S))
    done
    say "stopped"
    exit 0
}

"""Why our figures differ from the paper's: written by people after seeing them, per key of `paper_figures.py`. They are
shown where ours is not as the paper's."""

from __future__ import annotations

GENERAL: tuple[str, ...] = (
    "The paper's operating point cannot be rebuilt from its text. It took the trace's arrival times, as the load "
    "“trace” does here. But its FIFO with longs has delays only 2.5 to 10 times those without, so shorts alone must "
    "have brought its cluster near saturation. Here the trace's shorts need a small part of the cluster, and longs "
    "come several times faster than all its GPUs could prefill them: hence quotients of thousands where the paper has "
    "single figures. The loads of 50 % and 80 % are those at which shorts weigh.",
    "Every run goes on until its last request ends. Longs that came within the trace's time take many times as "
    "long to serve, so what waits in line behind them (FIFO) waits for hours; a measurement that stops with the "
    "trace would bound all of this by its length.",
    "All policies have the same cluster, its decode replicas included, so that only the scheduling differs. The "
    "baselines of the paper are whole systems (vLLM, Llumnix), which decode where they prefill.",
    "The plain ring of the baselines and of /FSP is the published one: the tokens in contiguous blocks, so that with a "
    "causal mask the last replica has the most to do. A zigzag order would balance it. Groups are sized by the way "
    "they will work: with fast SP most of the cluster, with a plain ring, which gains little from more, mostly one to "
    "three replicas.",
)
"""What holds of all of them."""

_SPARE = (
    "PecSched keeps replicas free for what shorts lately needed where pausing would stop a large group, so that few "
    "shorts have to pause anybody"
)
_DECODE_SHARE = (
    "The cluster is limited by the prefill of longs, and /Dis gives the decode replicas (an eighth of the GPUs, for "
    "Phi-3 a quarter) to prefill: longs gain about that much, and more than they lose to the decodes of shorts beside "
    "them."
)
_KEEPS_UP = "Where both keep up with the shorts as they come, throughput is the rate of arrivals and cannot differ."
_ORDER = (
    "PecSched takes the longs by remaining work with aging here, first come, first served in the paper; and fast SP "
    "makes better use of the cluster than the plain rings of the baselines."
)
_RESERVED_FOR = (
    "The part that Reservation leaves to shorts has no longs in it and serves them at this load, while FIFO's shorts "
    "stand behind longs; in the paper that part must have been overloaded by shorts alone."
)
_IDLE_TO_THE_END = "Counted to the last long's end: until then the part for shorts stands idle."

REASONS: dict[str, str] = {
    "fifo_delay": "Without longs, delays are milliseconds to seconds here; with them, the time to drain the longs.",
    "fifo_rps": "The time to the last short is the time to drain the longs before it.",
    "reservation_delay": _RESERVED_FOR,
    "reservation_rps": _RESERVED_FOR,
    "idle_fifo": "Nearly all of it are the decode replicas (an eighth of the GPUs, for Phi-3 a quarter), which have "
    "nothing to do while shorts wait behind longs.",
    "idle_reservation": f"{_IDLE_TO_THE_END} While requests come it is less: see the tables below.",
    "idle_more": _IDLE_TO_THE_END,
    "priority_starved": "It depends on how much of the time some short waits.",
    "pecsched_fifo_delay": "FIFO's delay is the time to drain the longs.",
    "pecsched_fifo_rps": "FIFO's shorts end with the longs before them, long after the last arrival.",
    "pecsched_fifo_jct": _ORDER,
    "pecsched_reservation_delay": "Where it is worse, it is by milliseconds: the part for shorts of Reservation is all "
    "but empty at this load, and has no long whose step a short must wait for.",
    "pecsched_reservation_rps": _KEEPS_UP,
    "pecsched_reservation_jct": f"{_ORDER} Reservation's longs have a part of the cluster only.",
    "no_preemption_jct": f"{_SPARE}: longs lose little to pauses, and gain as little without.",
    "no_disaggregation_jct": _DECODE_SHARE,
    "no_colocation_jct": "The trace's longs decode for a short time (half of them 15 tokens or fewer), and few shorts "
    "meet one: to share its steps or to stop it makes little difference.",
    "no_fast_sp_jct": "Groups of a plain ring are small here, and lose less by it than the paper's, of a given size.",
    "no_preemption_delay": "Without preemption a short that finds no free replica waits for a whole group. How often "
    "that is depends on how many are kept free: under bursts at high load shorts wait for each other either way.",
    "no_preemption_rps": _KEEPS_UP,
    "pecsched_preemptions": f"{_SPARE}; one pause takes in all shorts that wait, and pauses are budgeted.",
    "no_disaggregation_preemptions": "As for PecSched; and there are more replicas to prefill on.",
    "no_colocation_preemptions": "As for PecSched; and decodes of longs are short here.",
    "no_fast_sp_preemptions": "One pause takes in all shorts that wait, and pauses are budgeted.",
    "no_disaggregation_preemptions_over": "The decode replicas prefill too, so fewer shorts find no place. In the "
    "paper the decodes of shorts take places that other shorts then lack.",
    "no_colocation_preemptions_over": "It counts the decodes of longs that are stopped, and few shorts meet one: the "
    "trace's longs decode for a short time.",
    "no_fast_sp_preemptions_over": "Groups of a plain ring are small here and therefore cheap to pause: PecSched keeps "
    "no replica free beside them, and pauses one instead.",
    "scheduling_short": "Real time of Python code on the machine that ran this, other simulations beside it, over the "
    "completion times of this cluster, which are short where shorts do not wait.",
    "scheduling_long": "Real time of Python code on the machine that ran this, over this cluster's completion times.",
}

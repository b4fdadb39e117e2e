"""The evidence: what a policy scores, what it keeps of the reference's reward, its size and its speed."""

from rlquant.measure.agreement import ACTION_TOLERANCE, Agreement, QGap, action_agreement, q_gap
from rlquant.measure.allocation import Allocation, measure_allocation
from rlquant.measure.audition import Heard, audition
from rlquant.measure.goal import Goal, Outcome, Sensitivity, Trial, short_name
from rlquant.measure.latency import Latency, measure_latency, measure_side_by_side, single_thread
from rlquant.measure.machine import MachineState, pinned, watched
from rlquant.measure.measurement import Measurement, Score, Size, WeightHistogram, weight_histogram
from rlquant.measure.memory import available_bytes, peak_rss_bytes, rss_bytes
from rlquant.measure.results import SCHEMA, plain, results_document, validate_results
from rlquant.measure.retention import MORE_EPISODES_CAP, Retention, Verdict, compare
from rlquant.measure.search import PROOFS, Candidates, Search, proof_confidence
from rlquant.measure.statistics import Interval, iqm, mean_interval, std, worst_decile

__all__ = [
    "ACTION_TOLERANCE",
    "MORE_EPISODES_CAP",
    "PROOFS",
    "SCHEMA",
    "Agreement",
    "Allocation",
    "Candidates",
    "Goal",
    "Heard",
    "Interval",
    "Latency",
    "MachineState",
    "Measurement",
    "Outcome",
    "QGap",
    "Retention",
    "Score",
    "Search",
    "Sensitivity",
    "Size",
    "Trial",
    "Verdict",
    "WeightHistogram",
    "action_agreement",
    "audition",
    "available_bytes",
    "compare",
    "iqm",
    "mean_interval",
    "measure_allocation",
    "measure_latency",
    "measure_side_by_side",
    "peak_rss_bytes",
    "pinned",
    "plain",
    "proof_confidence",
    "q_gap",
    "results_document",
    "rss_bytes",
    "short_name",
    "single_thread",
    "std",
    "validate_results",
    "watched",
    "weight_histogram",
    "worst_decile",
]

"""torch.nn.LSTM, same arguments, same state_dict, same results, with the recurrence in fused Triton kernels."""

from importlib.metadata import PackageNotFoundError, version

from fastlstm.conversion import Report, convert, revert
from fastlstm.dispatch import Decision
from fastlstm.functional import lstm
from fastlstm.module import LSTM, LSTMCell, explain

try:
    __version__ = version("fastlstm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["LSTM", "Decision", "LSTMCell", "Report", "__version__", "convert", "explain", "lstm", "revert"]

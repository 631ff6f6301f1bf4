"""fastlstm against torch.nn.LSTM on the machine at hand: `python -m benchmarks`."""

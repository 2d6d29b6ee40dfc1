"""What ``inplace-ttt bench`` measures: ours beside no TTT, the materialised formula and the arithmetic limit."""

"""Where commands of this program are run: here, one after the other, or by a cluster's engine."""

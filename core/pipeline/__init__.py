"""The stages composed, no screen: what the command line and the pages both call."""

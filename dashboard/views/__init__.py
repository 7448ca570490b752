"""One page a file, run by `st.navigation`; none of them imports another."""

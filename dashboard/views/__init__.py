"""One file per page, run by `st.navigation`; none of them imports another."""

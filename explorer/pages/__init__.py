"""The pages of the app; the only modules that touch Streamlit."""

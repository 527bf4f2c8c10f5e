//! The step against the oracle.

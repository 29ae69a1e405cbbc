//! Pages that hold keys.

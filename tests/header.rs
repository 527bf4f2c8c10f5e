//! `include/mlstm.h` is what cbindgen makes of the documented Rust today.
//! `MLSTM_UPDATE_HEADER=1 cargo test --test header` rewrites it.

use std::path::Path;

#[test]
fn header_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut generated = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/capi/types.rs"))
        .with_src(root.join("src/capi/exports.rs"))
        .generate()
        .expect("cbindgen")
        .write(&mut generated);
    let path = root.join("include/mlstm.h");
    if std::env::var_os("MLSTM_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).expect("write the header");
    }
    let committed = std::fs::read(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "include/mlstm.h does not match src/capi; run `make header` and commit the result"
    );
}

#[test]
fn version_macros_match_the_package() {
    let header =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/mlstm.h"))
            .expect("header");
    for (name, value) in [
        ("MAJOR", env!("CARGO_PKG_VERSION_MAJOR")),
        ("MINOR", env!("CARGO_PKG_VERSION_MINOR")),
        ("PATCH", env!("CARGO_PKG_VERSION_PATCH")),
    ] {
        let line = format!("#define MLSTM_VERSION_{name} {value}\n");
        assert!(header.contains(&line), "missing {line}");
    }
}

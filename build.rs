//! Gives `libmlstm.so` its SONAME, so that programs linked today keep their ABI when it changes.

fn main() {
    let target_os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if target_os == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libmlstm.so.0");
    }
    println!("cargo:rerun-if-changed=build.rs");
}

//! Gives `libmlstm.so` its SONAME, so that programs linked today keep their ABI when it changes,
//! and compiles the CUDA kernels.

#[path = "kernels/build.rs"]
mod kernels;

fn main() {
    let target_os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if target_os == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libmlstm.so.0");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(message) = kernels::compile()
    {
        // Build scripts have no better way to end with a message of their own.
        eprintln!("{message}");
        std::process::exit(1);
    }
}

//! The rpath of this crate's tests: see the root package's build script.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let dir = std::path::PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_else(|| "../../.deps/libtorch".into()));
    match dir.join("lib").canonicalize() {
        Ok(lib) => println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display()),
        Err(e) => panic!(
            "libtorch is not set up ({}: {e}); run `cargo xtask setup`",
            dir.display()
        ),
    }
}

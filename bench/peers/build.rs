//! Refuses a build that would hold llama.cpp back: a peer without the machine's instructions flatters every ratio.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let flags = std::env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    if !flags.contains("target-cpu=native") {
        println!(
            "cargo::error=llama.cpp is built for this machine only with -C target-cpu=native: run cargo inside bench/peers, \
             where .cargo/config.toml sets it, and leave RUSTFLAGS unset"
        );
    }
}

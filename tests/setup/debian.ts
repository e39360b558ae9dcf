/**
 * Fetches the container runtimes for the end-to-end tests, and `ip` of other
 * releases of Debian, and unpacks them into vendor/deb/. The machine stays as it
 * is: apt uses its own lists here, and nothing is installed. A second run finds
 * the work done.
 *
 *     deno run -A tests/setup/debian.ts
 *     deno run -A tests/setup/debian.ts bookworm    only this folder
 *
 * @module
 */
import { emptyDir } from "@std/fs/empty-dir";
import { ensureDir } from "@std/fs/ensure-dir";
import { exists } from "@std/fs/exists";
import { ROOT } from "./root.ts";

/** One folder for each. */
export const DEBS = `${ROOT}vendor/deb`;
const LIBCNI = "golang-github-appc-cni"; // the source of libcni

/** The releases whose `ip` is tried, besides the machine's own. */
export const IP_RELEASES = ["bullseye", "trixie", "forky"];

/** What `ip` of Debian 13 and later loads. */
const IP = `iproute2 libbpf1 libc6 libcap2 libelf1t64 libmnl0 libpcre2-8-0
    libselinux1 libzstd1 zlib1g`;

/** The packages from a release of Debian. A folder is [NAME-]RELEASE. */
const PACKAGES: Record<string, string> = {
  // Debian 12: the last podman that speaks CNI, and a containerd of its time.
  bookworm: `containerd runc podman conmon crun busybox-static libgpgme11
    libsubid4 libyajl2 golang-github-containers-common
    golang-github-containers-image`,
  // The next one: the first containerd for CNI 1.1, and what a kubelet says.
  forky: "containerd",
  "cri-forky": "golang-k8s-cri-api-dev",
  // Debian 13: a Go that builds libcni; it goes when that is done.
  trixie: "golang-1.24-go golang-1.24-src",
  // `ip` with all its libraries: the machine's own don't fit.
  "ip-bullseye": `iproute2 libbpf0 libbsd0 libc6 libcap2 libelf1 libmd0 libmnl0
    zlib1g`,
  "ip-trixie": IP,
  "ip-forky": IP,
};

/** The release of a folder. */
const releaseOf = (folder: string) => folder.replace(/^\w+-/, "");

/** Prints and runs a shell line with some variables; throws if it fails. */
export async function sh(line: string, env: Record<string, string> = {}) {
  console.log(`$ ${line}`);
  const args = ["-ec", line];
  const stderr = "inherit";
  const { success, stdout } = await new Deno.Command("sh", {
    ...{ args, env, stderr },
  }).output();
  if (!success) throw new Error(`It failed: ${line}`);
  return new TextDecoder().decode(stdout);
}

/** apt's own files here. They are removed at the end. */
export const APT = `${DEBS}/apt`;

/**
 * Makes apt-get know some releases of Debian, and the sources of one. Returns the
 * variables that it needs for this. The machine's own apt stays as it is.
 */
export async function prepareApt(
  releases: string[],
  source: string,
): Promise<Record<string, string>> {
  const sources = await sh(
    "apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' " +
      "'Created-By: Packages'",
  );
  // The machine's own mirror.
  const mirror = Deno.env.get("DEBIAN_MIRROR") ??
    /^(\S+\/debian\/?) main$/m.exec(sources)?.[1];
  if (!mirror) throw new Error("No Debian here? Set DEBIAN_MIRROR to a URL");
  await ensureDir(`${APT}/lists/partial`);
  const keys = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg";
  const lines = [...new Set(releases)].map((release) =>
    `deb [${keys}] ${mirror} ${release} main\n`
  );
  lines.push(`deb-src [${keys}] ${mirror} ${source} main\n`);
  await Deno.writeTextFile(`${APT}/sources.list`, lines.join(""));
  await Deno.writeTextFile(
    `${APT}/apt.conf`,
    `Dir::Etc::sourcelist "${APT}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "${APT}/lists";
Dir::Cache "${APT}";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
`,
  );
  const env = { APT_CONFIG: `${APT}/apt.conf` };
  await sh("apt-get -q update", env);
  return env;
}

/** Downloads packages of a release, and unpacks them into a folder. */
export async function unpack(
  folder: string,
  packages: string,
  release: string,
  env: Record<string, string>,
): Promise<void> {
  const draft = `${folder}.draft`;
  await emptyDir(draft);
  const names = packages.trim().split(/\s+/)
    .map((each) => `${each}/${release}`).join(" ");
  await sh(`cd '${draft}' && apt-get -q download ${names}`, env);
  await sh(
    `cd '${draft}' && for deb in *.deb; do dpkg -x $deb .; rm $deb; done`,
  );
  await Deno.rename(draft, folder);
}

/** The folder for a PATH in which `ip` is that of a release. */
export const ipFolder = (release: string) => `${DEBS}/ip-${release}/path`;

/**
 * Writes a script that starts this `ip` with the loader and the libraries of its
 * own release. The paths may change, so each run writes it again.
 */
async function writeIp(release: string): Promise<void> {
  const script = `${ipFolder(release)}/ip`;
  await sh(`cd ${DEBS}/ip-${release} && mkdir -p path
    loader=$(find "$PWD" -path '*-linux-gnu*/ld-linux-*')
    ip=$(find "$PWD" -path '*bin/ip' -type f)
    libraries=$(find "$PWD" -type d -name '*-linux-gnu*' | paste -sd :)
    printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' \
      "$loader" "$libraries" "$ip" > ${script}
    chmod +x ${script} && ${script} -V`);
}

/** Builds cnitool, libcni's own command, and our gc.go with libcni. */
async function buildLibcni(env: Record<string, string>): Promise<void> {
  const folder = `${DEBS}/libcni-source`;
  await emptyDir(folder);
  const tar = `tar --strip-components=1 -xf ${LIBCNI}_*.orig.tar.*`;
  const get = `apt-get -q source --tar-only --download-only ${LIBCNI}/forky`;
  await sh(`cd '${folder}' && ${get} && ${tar}`, env);
  const go = `${DEBS}/trixie/usr/lib/go-1.24`;
  await sh(
    `cd '${folder}' && mkdir -p gc ../libcni.draft
    cp '${ROOT}tests/setup/gc.go' gc
    ${go}/bin/go build -o ../libcni.draft ./cnitool ./gc`,
    {
      ...{ GOROOT: go, GOCACHE: `${folder}/cache`, CGO_ENABLED: "0" },
      ...{ GOFLAGS: "-mod=mod", GOPROXY: "off", GOTOOLCHAIN: "local" },
    },
  );
  await Deno.rename(`${DEBS}/libcni.draft`, `${DEBS}/libcni`);
  await Deno.remove(folder, { recursive: true });
  await Deno.remove(`${DEBS}/trixie`, { recursive: true });
}

/** Makes an image with only busybox, in the format of `docker save`. */
async function buildImage(): Promise<void> {
  const folder = `${DEBS}/image`;
  await emptyDir(folder);
  const layer = await sh(`cd '${folder}'
    mkdir -p root/bin root/tmp root/etc
    cp ../bookworm/bin/busybox root/bin
    for applet in $(root/bin/busybox --list); do
      [ $applet = busybox ] || ln -s busybox root/bin/$applet
    done
    tar -C root --numeric-owner -cf layer.tar .
    sha256sum layer.tar`);
  const config = {
    architecture: Deno.build.arch === "x86_64" ? "amd64" : "arm64",
    os: "linux",
    config: { Env: ["PATH=/bin"], Cmd: ["sleep", "infinity"] },
    rootfs: { type: "layers", diff_ids: [`sha256:${layer.split(" ")[0]}`] },
  };
  const manifest = [{
    ...{ Config: "config.json", Layers: ["layer.tar"] },
    RepoTags: ["localhost/box:1"],
  }];
  for (const [name, json] of Object.entries({ config, manifest })) {
    await Deno.writeTextFile(`${folder}/${name}.json`, JSON.stringify(json));
  }
  await sh(`cd '${folder}' && tar -cf ../box.draft *.json layer.tar`);
  await Deno.rename(`${DEBS}/box.draft`, `${DEBS}/box.tar`);
  await Deno.remove(folder, { recursive: true });
}

if (import.meta.main) {
  const missing = async (name: string) => !await exists(`${DEBS}/${name}`);
  await ensureDir(DEBS);
  using lock = await Deno.open(DEBS);
  await lock.lock(true);
  const wanted = Deno.args.length ? Deno.args : Object.keys(PACKAGES);
  const needsLibcni = wanted.includes("trixie") && await missing("libcni");
  const folders: string[] = [];
  for (const name of wanted) {
    const isNeeded = name !== "trixie" || needsLibcni;
    if (isNeeded && await missing(name)) folders.push(name);
  }
  let env: Record<string, string> = {};
  if (folders.length || needsLibcni) {
    env = await prepareApt(wanted.map(releaseOf), "forky");
  }
  for (const name of folders) {
    await unpack(`${DEBS}/${name}`, PACKAGES[name], releaseOf(name), env);
  }
  for (const release of IP_RELEASES) {
    if (wanted.includes(`ip-${release}`)) await writeIp(release);
  }
  if (needsLibcni) await buildLibcni(env);
  if (await missing("box.tar")) await buildImage();
  if (await exists(APT)) await Deno.remove(APT, { recursive: true });
}

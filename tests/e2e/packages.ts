/**
 * Fetches the container runtimes that the end-to-end tests run, and unpacks
 * them into vendor/deb/. The machine stays as it is: apt gets lists of its own,
 * and nothing is installed. A second run finds the work done.
 *
 *     deno run -A tests/e2e/packages.ts
 *
 * @module
 */
import { emptyDir } from "@std/fs/empty-dir";
import { ensureDir } from "@std/fs/ensure-dir";
import { exists } from "@std/fs/exists";
import { ROOT } from "../lab.ts";

/** Where they lie, each release of Debian in a folder of its name. */
export const DEBS = `${ROOT}vendor/deb`;
const LIBCNI = "golang-github-appc-cni"; // the source of libcni

/** What is taken from each release of Debian, into a folder of its name. */
const PACKAGES: Record<string, string> = {
  // Debian 12: the last podman that speaks CNI, and a containerd of its time.
  bookworm: `containerd runc podman conmon crun busybox-static libgpgme11
    libsubid4 libyajl2 golang-github-containers-common
    golang-github-containers-image`,
  // The next one: the first containerd for CNI 1.1, and what a kubelet says.
  forky: "containerd golang-k8s-cri-api-dev",
  // Debian 13: a Go that builds libcni; it goes when that is done.
  trixie: "golang-1.24-go golang-1.24-src",
};

/** Runs a shell line with some variables, shows it, throws unless it works. */
async function sh(line: string, env: Record<string, string> = {}) {
  console.log(`$ ${line}`);
  const args = ["-ec", line];
  const stderr = "inherit";
  const { success, stdout } = await new Deno.Command("sh", {
    ...{ args, env, stderr },
  }).output();
  if (!success) throw new Error(`It failed: ${line}`);
  return new TextDecoder().decode(stdout);
}

/** An apt-get that knows Debian's releases by name, and leaves no trace. */
async function prepareApt(): Promise<string> {
  const sources = await sh(
    "apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' " +
      "'Created-By: Packages'",
  );
  // The machine's own mirror.
  const mirror = Deno.env.get("DEBIAN_MIRROR") ??
    /^(\S+\/debian\/?) main$/m.exec(sources)?.[1];
  if (!mirror) throw new Error("No Debian here? Set DEBIAN_MIRROR to a URL");
  const folder = `${DEBS}/apt`;
  await ensureDir(`${folder}/lists/partial`);
  const keys = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg";
  const lines = Object.keys(PACKAGES).map((release) =>
    `deb [${keys}] ${mirror} ${release} main\n`
  );
  lines.push(`deb-src [${keys}] ${mirror} forky main\n`);
  await Deno.writeTextFile(`${folder}/sources.list`, lines.join(""));
  await Deno.writeTextFile(
    `${folder}/apt.conf`,
    `Dir::Etc::sourcelist "${folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "${folder}/lists";
Dir::Cache "${folder}";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
`,
  );
  return `${folder}/apt.conf`;
}

/** Downloads packages, and unpacks them into a folder named by the release. */
async function unpack(release: string, env: Record<string, string>) {
  const folder = `${DEBS}/${release}`;
  const draft = `${folder}.draft`;
  await emptyDir(draft);
  const names = PACKAGES[release].trim().split(/\s+/);
  const packages = names.map((name) => `${name}/${release}`).join(" ");
  await sh(`cd ${draft} && apt-get -q download ${packages}`, env);
  await sh(`cd ${draft} && for deb in *.deb; do dpkg -x $deb .; rm $deb; done`);
  await Deno.rename(draft, folder);
}

/** Builds cnitool, libcni's own command, and our gc.go upon libcni. */
async function buildLibcni(env: Record<string, string>): Promise<void> {
  const folder = `${DEBS}/libcni-source`;
  await emptyDir(folder);
  const tar = `tar --strip-components=1 -xf ${LIBCNI}_*.orig.tar.*`;
  const get = `apt-get -q source --tar-only --download-only ${LIBCNI}/forky`;
  await sh(`cd ${folder} && ${get} && ${tar}`, env);
  const go = `${DEBS}/trixie/usr/lib/go-1.24`;
  await sh(
    `cd ${folder} && mkdir -p gc ../libcni.draft
    cp ${ROOT}tests/e2e/gc.go gc
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

/** Makes an image of busybox alone, as `docker save` would write it. */
async function buildImage(): Promise<void> {
  const folder = `${DEBS}/image`;
  await emptyDir(folder);
  const layer = await sh(`cd ${folder}
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
  await sh(`cd ${folder} && tar -cf ../box.draft *.json layer.tar`);
  await Deno.rename(`${DEBS}/box.draft`, `${DEBS}/box.tar`);
  await Deno.remove(folder, { recursive: true });
}

if (import.meta.main) {
  const missing = async (name: string) => !await exists(`${DEBS}/${name}`);
  await ensureDir(DEBS);
  using lock = await Deno.open(DEBS);
  await lock.lock(true);
  const wanted = await missing("libcni")
    ? Object.keys(PACKAGES)
    : ["bookworm", "forky"];
  const releases: string[] = [];
  for (const name of wanted) if (await missing(name)) releases.push(name);
  let env: Record<string, string> = {};
  if (releases.length || await missing("libcni")) {
    env = { APT_CONFIG: await prepareApt() };
    await sh("apt-get -q update", env);
  }
  for (const release of releases) await unpack(release, env);
  if (await missing("libcni")) await buildLibcni(env);
  if (await missing("box.tar")) await buildImage();
  if (await exists(`${DEBS}/apt`)) {
    await Deno.remove(`${DEBS}/apt`, { recursive: true });
  }
}

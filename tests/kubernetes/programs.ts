/**
 * Puts the programs of Kubernetes 1.20.2 into vendor/deb/kubernetes/, laid out
 * like a package. It is the last version whose source is complete in a release
 * of Debian. etcd and kubectl come from packages, and that release's Go builds
 * the rest. The machine stays as it is. A second run finds the work done, and
 * one after an interruption continues it.
 *
 *     deno run -A tests/kubernetes/programs.ts
 *
 * @module
 */
import { emptyDir } from "@std/fs/empty-dir";
import { ensureDir } from "@std/fs/ensure-dir";
import { exists } from "@std/fs/exists";
import * as packages from "../setup/debian.ts";
import { APT, DEBS, sh } from "../setup/debian.ts";

/** The release, and the programs. */
const RELEASE = "bookworm";
const PACKAGED = { etcd: "etcd-server", kubectl: "kubernetes-client" };
const BUILT = [
  ...["kubelet", "kube-proxy", "kube-scheduler"],
  ...["kube-controller-manager", "kube-apiserver"],
];
const VERSION = "v1.20.2";

/** Where the programs end up, and where they are built. */
const BIN = `${DEBS}/kubernetes/usr/bin`;
const BUILD = `${DEBS}/kubernetes.build`;
/** Before modules, Go found a program's packages by their path under GOPATH. */
const TREE = `${BUILD}/src/k8s.io/kubernetes`;
const COMPONENT = "k8s.io/kubernetes/vendor/k8s.io/component-base";

const GO = {
  GOROOT: `${BUILD}/go/usr/lib/go-1.19`,
  GOPATH: BUILD,
  GOCACHE: `${BUILD}/cache`,
  GOTMPDIR: BUILD,
  GO111MODULE: "off",
  CGO_ENABLED: "0",
};

/** Builds one program, without clouds, Docker and symbols. */
const goBuild = (name: string, folder: string) =>
  `cd ${TREE} && $GOROOT/bin/go build -tags "providerless dockerless" \
  -ldflags "-s -w -X ${COMPONENT}/version.gitVersion=${VERSION}" \
  -o ${BUILD}/${name} ${folder}`;

/**
 * Generates the one file that Debian's tree lacks: the description of the API,
 * from all packages that are marked for it.
 */
const OPENAPI = `${
  goBuild("openapi-gen", "./vendor/k8s.io/kube-openapi/cmd/openapi-gen")
}
packages=$(grep -rl --include='*.go' --exclude='*_test.go' \
    '+k8s:openapi-gen=' staging/src/k8s.io pkg plugin |
  grep -vE '/(testdata|tests?|sample-[^/]*|examples)/' |
  grep -vE '/(code-generator|kube-openapi)/' |
  xargs dirname | sort -u |
  sed -E 's,^staging/src/,vendor/,; s,^,k8s.io/kubernetes/,' | paste -sd ,)
PATH=$GOROOT/bin:$PATH ${BUILD}/openapi-gen -i $packages \
  -O zz_generated.openapi -p k8s.io/kubernetes/pkg/generated/openapi \
  --go-header-file hack/boilerplate/boilerplate.generatego.txt \
  -r ${BUILD}/violations --output-base ${BUILD}/src`;

/** Runs a shell line, silently unless it fails. */
async function quietly(line: string): Promise<void> {
  const { success, stderr } = await new Deno.Command("sh", {
    ...{ args: ["-ec", line], env: GO },
  }).output();
  if (success) return;
  throw new Error(`${line}\n${new TextDecoder().decode(stderr)}`);
}

/** Builds a program, and prints its time and size. */
async function build(name: string): Promise<void> {
  const start = Date.now();
  await Deno.stdout.write(new TextEncoder().encode(`Building ${name} … `));
  if (name === "kube-apiserver") await quietly(OPENAPI);
  await quietly(goBuild(name, `./cmd/${name}`));
  const { size } = await Deno.stat(`${BUILD}/${name}`);
  await Deno.rename(`${BUILD}/${name}`, `${BIN}/${name}`);
  const seconds = Math.round((Date.now() - start) / 1000);
  console.log(`${seconds} s, ${Math.round(size / 1e6)} MB`);
}

/** Fetches the two packages, and keeps only their programs. */
async function fetchPackaged(env: Record<string, string>): Promise<void> {
  const folder = `${BUILD}/packages`;
  await emptyDir(folder); // an earlier run may have been interrupted
  const names = Object.values(PACKAGED).join(" ");
  await packages.unpack(folder, names, RELEASE, env);
  for (const name of Object.keys(PACKAGED)) {
    await Deno.rename(`${folder}/usr/bin/${name}`, `${BIN}/${name}`);
  }
}

/** Fetches Go and the source. */
async function fetchSource(env: Record<string, string>): Promise<void> {
  const go = `${BUILD}/go`;
  await emptyDir(go);
  await packages.unpack(go, "golang-1.19-go golang-1.19-src", RELEASE, env);
  await emptyDir(`${BUILD}/tree`);
  const get = "apt-get -q source --tar-only --download-only kubernetes";
  await sh(
    `cd ${BUILD} && mkdir -p src/k8s.io && ${get}/${RELEASE}
    tar --strip-components=1 -C tree -xf kubernetes_*.orig.tar.*
    rm kubernetes_* && mv tree ${TREE}`,
    env,
  );
}

if (import.meta.main) {
  const missing = async (name: string) => !await exists(`${BIN}/${name}`);
  using lock = await Deno.open(DEBS);
  await lock.lock(true);
  await ensureDir(BIN);
  await ensureDir(BUILD);
  const toFetch = await missing("etcd") || await missing("kubectl");
  const toBuild = [];
  for (const name of BUILT) if (await missing(name)) toBuild.push(name);
  const needsSource = toBuild.length > 0 && !await exists(TREE);
  if (toFetch || needsSource) {
    const env = await packages.prepareApt([RELEASE], RELEASE);
    if (toFetch) await fetchPackaged(env);
    if (needsSource) await fetchSource(env);
    await Deno.remove(APT, { recursive: true });
  }
  for (const name of toBuild) await build(name);
  await Deno.remove(BUILD, { recursive: true });
}

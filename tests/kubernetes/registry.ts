/**
 * A registry for the images of pods.yaml, on the lab's router, so that you can
 * apply the file unchanged. Both images are busybox. This nginx says whose
 * request it answers.
 *
 *     deno run -A tests/kubernetes/registry.ts
 *
 * @module
 */
import { DEBS } from "../setup/debian.ts";

const SERVE = `mkdir -p /www/cgi-bin && cd /www/cgi-bin
printf '#!/bin/sh\\necho; echo "%s sees $REMOTE_ADDR"\\n' $(hostname) \
  > index.cgi
chmod +x index.cgi && exec httpd -f -p 0.0.0.0:80 -h /www`;

/** The images, and each one's default command. */
const COMMANDS = { nginx: ["sh", "-c", SERVE], alpine: ["sh"] };

/** The media types of Docker's registries. */
const TYPE = "application/vnd.docker";
const MANIFEST = `${TYPE}.distribution.manifest.v2+json`;

/** The content: manifests by name, and everything by digest. */
const content = new Map<string, { mediaType: string; bytes: BodyInit }>();

/** Adds a part of an image, and returns a reference to it. */
async function add(mediaType: string, bytes: Uint8Array<ArrayBuffer>) {
  const sha256 = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const digest = `sha256:${sha256.toHex()}`;
  content.set(digest, { mediaType, bytes });
  return { mediaType, digest, size: bytes.length };
}

const json = (value: unknown) =>
  new TextEncoder().encode(JSON.stringify(value));

if (import.meta.main) {
  const { stdout: tar } = await new Deno.Command("tar", {
    args: ["-xOf", `${DEBS}/box.tar`, "layer.tar"],
  }).output();
  const layer = await add(`${TYPE}.image.rootfs.diff.tar`, tar);
  for (const [name, Cmd] of Object.entries(COMMANDS)) {
    const image = {
      architecture: Deno.build.arch === "x86_64" ? "amd64" : "arm64",
      os: "linux",
      config: { Env: ["PATH=/bin"], Cmd },
      rootfs: { type: "layers", diff_ids: [layer.digest] },
    };
    const manifest = {
      ...{ schemaVersion: 2, mediaType: MANIFEST, layers: [layer] },
      config: await add(`${TYPE}.container.image.v1+json`, json(image)),
    };
    const { digest } = await add(MANIFEST, json(manifest));
    content.set(name, content.get(digest)!);
  }
  Deno.serve({ port: 5000 }, ({ url }) => {
    // /v2/library/nginx/manifests/latest, or a digest at the end
    const [name, , reference] = new URL(url).pathname.split("/").slice(-3);
    const found = content.get(reference === "latest" ? name : reference);
    if (!found) return new Response(null, { status: 404 });
    return new Response(found.bytes, {
      headers: { "content-type": found.mediaType },
    });
  });
}

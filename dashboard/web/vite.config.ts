import { defineConfig } from "vite";

/** File names carry no hash: the daemon revalidates by ETag, and a rebuilt wheel can hold no leftovers of an older build. */
export default defineConfig({
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    // A data: URI would be refused by the page's own Content-Security-Policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rollupOptions: {
      output: {
        entryFileNames: "assets/page.js",
        chunkFileNames: "assets/[name].js",
        assetFileNames: "assets/[name][extname]",
      },
    },
  },
  // `npm run dev` shows the page from its sources against a node that runs on this machine.
  server: {
    proxy: Object.fromEntries(["/api", "/v1"].map((path) => [path, process.env["SWARMD_URL"] ?? "http://127.0.0.1:8642"])),
  },
});

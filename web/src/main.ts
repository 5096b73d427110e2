import { mount } from "svelte";
import "./app.css";
import App from "./App.svelte";
import { repairLocale } from "./lib/locale";

repairLocale();
mount(App, { target: document.getElementById("app")! });
